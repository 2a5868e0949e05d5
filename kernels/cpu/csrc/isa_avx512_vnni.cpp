#define PW_ISA avx512_vnni
#include "isa.inc"
