#define DK_TYPE c10::Half
#include "avx512.h"
