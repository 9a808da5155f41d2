// The backward of lstm_sequence on the CPU, of one instruction set: sequences of groups [begin, end).
#pragma once
#include "lstm/lstm.h"

namespace deepops::DEEPOPS_ISA {

void lstm_backward(const LstmShape& p, const LstmBackward& args, int64_t begin, int64_t end);

}  // namespace deepops::DEEPOPS_ISA
