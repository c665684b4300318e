// Faults of the processor inside a kernel: see faults.h.
//
// The kernels are compiled with UBSan's check of alignment, which executes an illegal instruction
// where a vector access is misaligned. That is how a GPU behaves too, and x86 does not.
#include "faults.h"

#include <pthread.h>
#include <signal.h>
#include <ucontext.h>

namespace shim {

#if defined(SHIM_ASAN) || defined(SHIM_TSAN)

void watch_for_faults(void (*)(Fault, const char*)) {}
void ignore_faults() {}

#else

namespace {

volatile bool watching;
pthread_t watched;
void (*report_fault)(Fault, const char*);
struct sigaction before[3];
const int signals[3] = {SIGSEGV, SIGBUS, SIGILL};

void bad_address() {
    report_fault(Fault::ILLEGAL_ADDRESS, "the kernel accessed memory that is not mapped");
}
void misaligned() {
    report_fault(Fault::MISALIGNED, "an access at an address that is no multiple of its size");
}

void on_signal(int signal, siginfo_t*, void* context) {
    if (!watching || !pthread_equal(watched, pthread_self())) {
        // Not ours. The instruction faults again and meets the handler that was there before.
        for (int i = 0; i < 3; i++)
            if (signals[i] == signal) sigaction(signal, &before[i], nullptr);
        return;
    }
    // Go on in `report`, on the fiber's stack, as if the faulting instruction had called it.
    auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    void (*next)() = signal == SIGILL ? misaligned : bad_address;
    registers[REG_RIP] = reinterpret_cast<greg_t>(next);
    registers[REG_RSP] = ((registers[REG_RSP] - 256) & ~greg_t(15)) - 8;
}

}  // namespace

void watch_for_faults(void (*report)(Fault, const char*)) {
    report_fault = report;
    watched = pthread_self();
    struct sigaction action = {}, now;
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 3; i++) {
        sigaction(signals[i], nullptr, &now);
        if (now.sa_sigaction == on_signal) continue;
        before[i] = now;
        sigaction(signals[i], &action, nullptr);
    }
    watching = true;
}
void ignore_faults() { watching = false; }

#endif

}  // namespace shim
