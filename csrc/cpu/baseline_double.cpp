#define DK_TYPE double
#include "baseline.h"
