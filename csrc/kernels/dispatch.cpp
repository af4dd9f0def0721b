#include "kernels/dispatch.h"

#include <atomic>

namespace repo {
namespace {

std::atomic<const RowKernels*> selected{nullptr};

}  // namespace

std::vector<const RowKernels*> available_kernels() {
    std::vector<const RowKernels*> sets;
#if defined(REPO_X86_KERNELS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        sets.push_back(&avx512_kernels);
    if (avx2) sets.push_back(&avx2_kernels);
#endif
    sets.push_back(&generic_kernels);
    return sets;
}

const RowKernels& kernels() {
    const RowKernels* chosen = selected.load();
    if (!chosen) selected.store(chosen = available_kernels().front());
    return *chosen;
}

bool select_kernels(const std::string& name) {
    for (const RowKernels* candidate : available_kernels()) {
        if (name == candidate->name) {
            selected.store(candidate);
            return true;
        }
    }
    return false;
}

}  // namespace repo
