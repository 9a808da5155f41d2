// depthwise_bn_act on CUDA
