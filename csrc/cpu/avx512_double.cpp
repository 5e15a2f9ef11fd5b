#define DK_TYPE double
#include "avx512.h"
