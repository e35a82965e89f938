// The interface between the dispatcher and the kernels, which are compiled once per instruction set.
// Shapes: N rows, C channels, P patches of s*s rows (Z-order), K kernel size, G groups of rows, D hidden channels.
#pragma once
#include <cstdint>

namespace sparse_ops {

enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };

struct DepthwiseArgs {
    const void* x;             // [N, C]
    const void* other;         // forward: weight [C, K, K]; weight gradient: grad [N, C]
    const void* bias;          // [C] or null (forward only)
    const int32_t* neighbours; // [P, (2R+1)^2], -1 where there is no visible patch
    void* out;                 // forward: [N, C]; weight gradient: [C, K, K]
    int64_t patches;
    int64_t channels;
    int side;
    int kernel;
    int reverse_taps;
    int threads;
};

struct GeluGrnArgs {
    const void* h;          // [N, D]
    const void* bias;       // [D], added to h before GELU
    const void* gamma;      // [D]
    const void* beta;       // [D]
    const int64_t* offsets; // [G + 1]
    void* norms;            // [G, D]: written forward, read backward
    void* y;                // [N, D]: the output, recomputed backward
    void* grad;             // [N, D]: backward, the gradient for y in, the gradient for h out
    void* grad_gamma;       // [D]
    void* grad_beta;        // [D]
    void* grad_bias;        // [D]: column sums of the gradient for h
    double eps;
    int64_t groups;
    int64_t dim;
    int threads;
};

struct LayerNormArgs {
    const void* grad;    // [N, C]
    const void* x;       // [N, C]
    const void* mean;    // [N]
    const void* rstd;    // [N]
    const void* weight;  // [C]
    const void* bias;    // [C]
    void* normed;        // [N, C]: the output of the forward pass again
    void* grad_x;        // [N, C]
    void* grad_weight;   // [C]
    void* grad_bias;     // [C]
    int64_t rows;
    int64_t channels;
    int threads;
};

// The pointwise half of a block: D hidden channels, a multiple of the width of a vector.
struct MlpArgs {
    const void* x;            // [N, C]
    const void* norm_weight;  // [C]
    const void* norm_bias;    // [C]
    const void* w1;           // [D, C]
    const void* b1;           // [D]
    const void* gamma;        // [D]
    const void* beta;         // [D]
    const void* w2;           // [C, D]
    const void* b2;           // [C]
    const int64_t* offsets;   // [G + 1]
    void* h;                  // [N, D]: the hidden layer before b1; written forward, read backward, like the next three
    void* mean;               // [N]
    void* rstd;               // [N]
    void* norms;              // [G, D]
    void* out;                // [N, C], forward
    const void* grad;         // [N, C], backward, the gradient for out, like the rest
    void* grad_x;             // [N, C]
    void* grad_norm_weight;   // [C]
    void* grad_norm_bias;     // [C]
    void* grad_w1;            // [D, C]
    void* grad_b1;            // [D]
    void* grad_gamma;         // [D]
    void* grad_beta;          // [D]
    void* grad_w2;            // [C, D]
    void* grad_b2;            // [C]
    double norm_eps;
    double grn_eps;
    int64_t groups;
    int64_t channels;
    int64_t dim;
    int threads;
};

// Each returns 0, or -1 where the dtype or kernel size is not compiled in.
struct Kernels {
    const char* name;
    int (*depthwise)(const DepthwiseArgs&, int dtype);
    int (*depthwise_weight_grad)(const DepthwiseArgs&, int dtype);
    int (*gelu_grn)(const GeluGrnArgs&, int dtype);
    int (*gelu_grn_backward)(const GeluGrnArgs&, int dtype);
    int (*layer_norm_backward)(const LayerNormArgs&, int dtype);
    int (*mlp)(const MlpArgs&, int dtype);
    int (*mlp_backward)(const MlpArgs&, int dtype);
};

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

// Calls body(context, task) for every task in [0, tasks), from several threads. Results must not depend on which
// thread runs a task: that keeps them bit-identical for every number of threads.
void parallel_tasks(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

}  // namespace sparse_ops
