// Faults of the processor inside a kernel, reported as a GPU reports them.
#pragma once
#include "engine.h"

namespace shim {

// While the calling thread runs kernels, a fault in one of them calls `report` on the fiber's
// stack. A sanitizer reports such faults better; with one these functions do nothing.
void watch_for_faults(void (*report)(Fault fault, const char* what));
void ignore_faults();

}  // namespace shim
