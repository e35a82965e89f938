#define KERNELS kBaselineKernels
#define INSTRUCTION_SET "baseline"
#include "kernels.inc"
