#define PW_ISA generic
#include "isa.inc"
