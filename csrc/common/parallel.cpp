#include "common/parallel.h"

#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace repo {
namespace {

using Work = void (*)(void*);

// Threads of one call, joined at its end.
void on_new_threads(int threads, Work work, void* context) {
    std::vector<std::thread> helpers;
    try {
        helpers.reserve(threads);
        while (int(helpers.size()) + 1 < threads) helpers.emplace_back(work, context);
    } catch (const std::system_error&) {
        // no more threads to be had: those there are do the work
    }
    work(context);
    for (std::thread& helper : helpers) helper.join();
}

using OpenMp = void (*)(Work work, void* context, unsigned threads, unsigned flags);

// The entry of the OpenMP runtime that PyTorch has loaded, if it has one. Its threads wait for work awake for a while:
// other threads would have to share the cores with them, and starting those takes longer.
OpenMp find_open_mp() {
#if defined(__unix__)
    return reinterpret_cast<OpenMp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

// The runtime's threads do not exist in a child after fork, and it would wait for them.
bool is_first_process() {
#if defined(__unix__)
    static const pid_t first = getpid();
    return getpid() == first;
#else
    return true;
#endif
}

const bool first_process_known = is_first_process();

}  // namespace

void on_threads(int threads, Work work, void* context) {
    static const OpenMp open_mp = find_open_mp();
    if (threads <= 1) {
        work(context);
    } else if (open_mp && first_process_known && is_first_process()) {
        open_mp(work, context, unsigned(threads), 0);
    } else {
        on_new_threads(threads, work, context);
    }
}

}  // namespace repo
