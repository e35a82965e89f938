#define KERNELS kAvx2Kernels
#define INSTRUCTION_SET "avx2"
#include "kernels.inc"
