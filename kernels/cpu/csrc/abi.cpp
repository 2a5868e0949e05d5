// The C ABI: what is common to all models. A model's own functions are in step.cpp.
#include "abi.h"

#include "isa.h"

extern "C" {

int32_t pw_abi(void) { return PW_ABI; }
const char *pw_isas(void) { return pw::kernel_names(); }

}  // extern "C"
