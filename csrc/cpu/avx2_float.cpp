#define DK_TYPE float
#include "avx2.h"
