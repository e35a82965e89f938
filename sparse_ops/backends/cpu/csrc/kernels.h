// The interface between the dispatcher and the kernels, which are compiled once per instruction set.
// Shapes: N rows, C channels, P patches of s*s rows (Z-order), K kernel size, G groups of rows, D hidden channels.
// Numbers are of type S.
#pragma once
#include <cstdint>

namespace sparse_ops {

template <typename S> struct DepthwiseArgs {
    const S* x;                // [N, C]
    const S* other;            // forward: weight [C, K, K]; weight gradient: grad [N, C]
    const S* bias;             // [C] or null (forward only)
    const int32_t* neighbours; // [P, (2R+1)^2], -1 where there is no visible patch
    S* out;                    // forward: [N, C]; weight gradient: [C, K, K]
    int64_t patches, channels;
    int side, kernel, reverse_taps, threads;
};

template <typename S> struct GeluGrnArgs {
    const S *h, *bias;            // [N, D]; [D], added to h before GELU
    const S *gamma, *beta;        // [D]
    const int64_t* offsets;       // [G + 1]
    S* norms;                     // [G, D]: written forward, read backward
    S* y;                         // [N, D]: the output, recomputed backward
    S* grad;                      // [N, D]: backward, the gradient for y in, the gradient for h out
    S *grad_gamma, *grad_beta;    // [D]
    S* grad_bias;                 // [D]: column sums of the gradient for h
    double eps;
    int64_t groups, dim;
    int threads;
};

template <typename S> struct LayerNormArgs {
    const S *grad, *x;            // [N, C]
    const S *mean, *rstd;         // [N]
    const S *weight, *bias;       // [C]
    S* normed;                    // [N, C]: the output of the forward pass again
    S* grad_x;                    // [N, C]
    S *grad_weight, *grad_bias;   // [C]
    int64_t rows, channels;
    int threads;
};

// The pointwise half of a block: D hidden channels, a multiple of the width of a vector.
template <typename S> struct MlpArgs {
    const S* x;                              // [N, C]
    const S *norm_weight, *norm_bias;        // [C]
    const S *w1, *b1, *gamma, *beta;         // [D, C], the others [D]
    const S *w2, *b2;                        // [C, D], [C]
    const int64_t* offsets;                  // [G + 1]
    S* h;                                    // [N, D]: the hidden layer before b1; written forward, read backward
    S *mean, *rstd, *norms;                  // [N], [N], [G, D]: the same
    S* out;                                  // [N, C], forward
    const S* grad;                           // [N, C], backward, the gradient for out, like the rest
    S *grad_x, *grad_norm_weight, *grad_norm_bias;  // each as what it is the gradient for
    S *grad_w1, *grad_b1, *grad_gamma, *grad_beta, *grad_w2, *grad_b2;
    double norm_eps, grn_eps;
    int64_t groups, channels, dim;
    int threads;
};

// Takes the arguments of its kind and dtype; returns 0, or -1 where the kernel size or width is not compiled in.
using Kernel = int (*)(const void* args);

// Of every kind one for each dtype, in the order of library.py: float32, float64, bfloat16. Null where there is none.
struct Kernels {
    const char* name;
    Kernel depthwise[3], depthwise_weight_grad[3];
    Kernel depthwise_map[3], depthwise_map_weight_grad[3];
    Kernel gelu_grn[3], gelu_grn_backward[3];
    Kernel layer_norm_backward[3];
    Kernel mlp[3], mlp_backward[3], mlp_result[3];
};

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

// Calls body(context, task) for every task in [0, tasks), from several threads. Results must not depend on which
// thread runs a task: that keeps them bit-identical for every number of threads.
void parallel_tasks(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

}  // namespace sparse_ops
