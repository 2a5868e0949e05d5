#define PW_ISA avx2
#include "isa.inc"
