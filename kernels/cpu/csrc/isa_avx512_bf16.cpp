#define PW_ISA avx512_bf16
#include "isa.inc"
