#define DK_TYPE c10::BFloat16
#include "avx2.h"
