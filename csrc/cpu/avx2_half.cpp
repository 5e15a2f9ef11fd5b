#define DK_TYPE c10::Half
#include "avx2.h"
