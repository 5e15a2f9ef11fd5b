#define DK_TYPE double
#include "avx2.h"
