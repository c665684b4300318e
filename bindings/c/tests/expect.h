/* Conditions that end a test program where they do not hold. */
#include <stdio.h>
#include <stdlib.h>

#include "pillion.h"

#define CHECK(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__,  \
                    #condition, pillion_last_error());                          \
            exit(1);                                                            \
        }                                                                       \
    } while (0)
#define OK(call) CHECK((call) == PILLION_OK)
