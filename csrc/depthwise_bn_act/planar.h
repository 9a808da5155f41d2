// depthwise_bn_act of contiguous data on the CPU, for the registration in depthwise_bn_act.cpp. Arguments as in the
// ops.
#pragma once
#include <tuple>

#include "depthwise_bn_act/host.h"

namespace deepops {

std::tuple<Tensor, Tensor, Tensor> depthwise_train_planes(
    const DepthwiseShape& shape, const Tensor& x, const Tensor& conv_weight, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps);

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_backward_planes(const DepthwiseShape& shape, const Tensor& grad_y,
                                                                     const Tensor& x, const Tensor& conv_weight,
                                                                     const OptionalTensor& weight,
                                                                     const OptionalTensor& bias, const Tensor& mean,
                                                                     const Tensor& invstd, bool need_x,
                                                                     bool need_conv_weight, bool need_affine);

}  // namespace deepops
