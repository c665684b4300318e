// NVRTC asks the driver for a table of private functions before it compiles. An empty table, which
// only has its own size, tells it that there are none.
#include <stddef.h>
#include <stdint.h>
extern "C" __attribute__((visibility("default"))) int cuGetExportTable(const void** table,
                                                                         const void*) {
    static const uint64_t EMPTY[1] = {sizeof EMPTY};
    *table = EMPTY;
    return 0;
}
