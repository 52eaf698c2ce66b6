// The only header of a translated kernel; precompiled, because parsing it is most of the compile
// time of a small kernel.
#pragma once
#include "floating.h"
#include "sim.h"
