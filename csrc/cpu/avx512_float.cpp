#define DK_TYPE float
#include "avx512.h"
