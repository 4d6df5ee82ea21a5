/* cuBLAS' headers ask for this one; none of its types is needed here. */
#pragma once
