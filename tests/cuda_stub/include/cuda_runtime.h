/* cuDNN's and cuBLAS' headers ask for this one; they need the runtime's functions and types alone. */
#pragma once
#include <cuda_runtime_api.h>
