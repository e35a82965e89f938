// C interface of the library, choice of the instruction set at run time, and threads.
// The library depends on neither torch nor Python, so an upgrade of either cannot break it.
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels.h"

namespace sparse_ops {
namespace {

struct Work {
    std::atomic<int64_t> next;
    int64_t tasks;
    void (*body)(void*, int64_t);
    void* context;
};

void drain(void* data) {
    auto* work = static_cast<Work*>(data);
    for (int64_t task; (task = work->next.fetch_add(1, std::memory_order_relaxed)) < work->tasks;)
        work->body(work->context, task);
}

// torch brings an OpenMP runtime and loads it globally. Using that one, found by name, instead of linking another
// keeps one pool of threads in the process: two would spin against each other.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel gomp_parallel() {
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

bool supports(const char* name) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    if (!std::strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !std::strcmp(name, "baseline");
}

const Kernels* const kCompiled[] = {
#ifdef SPARSE_OPS_HAVE_AVX512
    &kAvx512Kernels,
#endif
#ifdef SPARSE_OPS_HAVE_AVX2
    &kAvx2Kernels,
#endif
    &kBaselineKernels,
};

// The widest set the processor has, or the one named in SPARSE_OPS_CPU if the processor has it.
const Kernels& choose() {
    const char* wanted = std::getenv("SPARSE_OPS_CPU");
    for (const Kernels* kernels : kCompiled)
        if (supports(kernels->name) && (!wanted || !*wanted || !std::strcmp(wanted, kernels->name))) return *kernels;
    return kBaselineKernels;
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace

void parallel_tasks(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
    Work work{{0}, tasks, body, context};
    const int64_t wanted = threads < tasks ? threads : tasks;
    if (wanted <= 1) return drain(&work);
    if (auto run = gomp_parallel()) return run(drain, &work, static_cast<unsigned>(wanted), 0);
    std::vector<std::thread> pool;
    for (int64_t i = 1; i < wanted; ++i) pool.emplace_back(drain, &work);
    drain(&work);
    for (auto& thread : pool) thread.join();
}

}  // namespace sparse_ops

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int sparse_ops_interface_version() { return 6; }
EXPORT const char* sparse_ops_instruction_set() { return sparse_ops::kernels().name; }
EXPORT const char* sparse_ops_threads() { return sparse_ops::gomp_parallel() ? "OpenMP of torch" : "std::thread"; }

#define EXPORT_KERNEL(name)                                                  \
    EXPORT int sparse_ops_##name(const void* args, int dtype) {              \
        const sparse_ops::Kernel kernel = sparse_ops::kernels().name[dtype]; \
        return kernel ? kernel(args) : -1;                                   \
    }
EXPORT_KERNEL(depthwise)
EXPORT_KERNEL(depthwise_weight_grad)
EXPORT_KERNEL(depthwise_map)
EXPORT_KERNEL(depthwise_map_weight_grad)
EXPORT_KERNEL(gelu_grn)
EXPORT_KERNEL(gelu_grn_backward)
EXPORT_KERNEL(layer_norm_backward)
EXPORT_KERNEL(mlp)
EXPORT_KERNEL(mlp_backward)
EXPORT_KERNEL(mlp_result)
