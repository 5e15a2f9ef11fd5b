#define DK_TYPE c10::BFloat16
#include "avx512.h"
