#define DK_TYPE float
#include "baseline.h"
