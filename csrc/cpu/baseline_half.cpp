#define DK_TYPE c10::Half
#include "baseline.h"
