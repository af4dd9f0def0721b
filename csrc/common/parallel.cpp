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

// Starts threads for one call and joins them.
void on_new_threads(int threads, Work work, void* context) {
    std::vector<std::thread> helpers;
    try {
        helpers.reserve(threads);
        while (int(helpers.size()) + 1 < threads) helpers.emplace_back(work, context);
    } catch (const std::system_error&) {
        // the system grants no more threads: those that exist do the work
    }
    work(context);
    for (std::thread& helper : helpers) helper.join();
}

using OpenMp = void (*)(Work work, void* context, unsigned threads, unsigned flags);

// Returns the entry of the OpenMP runtime that PyTorch has loaded, or null. Its threads spin for a while when they wait
// for work: threads of our own would share the cores with them, and take longer to start.
OpenMp find_open_mp() {
#if defined(__unix__)
    return reinterpret_cast<OpenMp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

// Returns whether this is the process that loaded the extension. In a child that it has forked the OpenMP runtime would
// wait for threads that fork did not copy.
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
