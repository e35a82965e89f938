#define KERNELS kAvx512Kernels
#define INSTRUCTION_SET "avx512"
#include "kernels.inc"
