// Statistics of a batch whose parts lie in several processes, put together on host or device.
//
// They travel as one vector [2 C + 1] of doubles a process: C means, C biased variances, and how many values a channel
// has there.
#pragma once
#include "core/host_device.h"

namespace deepops {

struct JoinedMoments {
  double count = 0, mean = 0, variance = 0;

  // Takes in one more part (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983). A part
  // without values changes nothing, and a single part keeps its bits.
  DEEPOPS_HD void add(double part_count, double part_mean, double part_variance) {
    if (part_count == 0) return;
    const double total = count + part_count, share = part_count / total, rest = count / total;
    const double apart = part_mean - mean;
    // Infinities stay what they are, as in a sum.
    mean = count == 0 ? part_mean : apart - apart == 0 ? mean + apart * share : mean + part_mean;
    variance = count == 0 ? part_variance : variance * rest + part_variance * share + apart * apart * share * rest;
    count = total;
  }
};

}  // namespace deepops
