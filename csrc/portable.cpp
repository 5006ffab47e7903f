#include "kernels.h"
#include "parallel.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#define MOEFORGE_SET portable
#include "kernels.inc"
