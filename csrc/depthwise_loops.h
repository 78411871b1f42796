// The inner loops of the depthwise 7×7 convolution of visible cells. loops.h includes it, and says what holds for it.
//
// A cell has S×S positions. What is added up for a row of positions stays in registers: S positions of V vectors of
// channels, so that V·S = kSums sums run side by side. Neighbours to the left and right come cell by cell, and those
// that are masked are passed over. All indices into registers are constants.

namespace fastmae {
namespace {

constexpr int kTaps = 7, kReach = 3;  // weights of a row; how far they reach from their middle
constexpr int kSums = 8;

template <int I>
struct Constant {
  static constexpr int value = I;
};

// Calls body(Constant<0>{}), body(Constant<1>{}) … body(Constant<Count - 1>{}).
template <int Count, int I = 0, class Body>
__attribute__((always_inline)) inline void unrolled(const Body& body) {
  if constexpr (I < Count) {
    body(Constant<I>{});
    unrolled<Count, I + 1>(body);
  }
}

// The cells around one: Cells × Cells of them, with itself in the middle.
template <int S>
struct Around {
  static constexpr int kCells = (kReach + S - 1) / S, kSide = 2 * kCells + 1;
};

// Calls body(pointer to the first position of the row in that cell, Constant<column of the cell>{}) for the visible cells
// that hold the row y of a cell, which may lie outside of it.
template <int S, class T, class Body>
__attribute__((always_inline)) inline void for_each_visible(const T* x, const std::int32_t* around, std::int64_t C,
                                                            int y, const Body& body) {
  constexpr int kSide = Around<S>::kSide;
  const int from_top = y + Around<S>::kCells * S;
  const std::int32_t* slots = around + from_top / S * kSide;
  unrolled<kSide>([&](auto column) __attribute__((always_inline)) {
    const std::int64_t slot = slots[column.value];
    if (slot >= 0) body(x + (slot * S + from_top % S) * S * C, column);
  });
}

// Calls body(Constant<position of the row in that cell>, Constant<position of the result>, Constant<tap>) for all pairs.
template <int S, int Column, class Body>
__attribute__((always_inline)) inline void for_each_pair(const Body& body) {
  unrolled<S>([&](auto from) __attribute__((always_inline)) {
    unrolled<S>([&](auto to) __attribute__((always_inline)) {
      constexpr int kTap = (Column - Around<S>::kCells) * S + decltype(from)::value - decltype(to)::value + kReach;
      if constexpr (kTap >= 0 && kTap < kTaps) body(from, to, Constant<kTap>{});
    });
  });
}

template <int S, int V, class T>
void depthwise_of(const DepthwiseCells& cells, const T* x, const float* weights, const float* bias, T* out) {
  constexpr int kSide = Around<S>::kSide;
  const std::int64_t C = cells.C;
  for (std::int64_t k = 0; k < cells.K; ++k) {
    const std::int32_t* around = cells.around + k * kSide * kSide;
    for (int row = 0; row < S; ++row) {
      Float sums[S][V];
      unrolled<V>([&](auto v) __attribute__((always_inline)) {
        const Float first = bias ? load(bias + v.value * kLanes) : broadcast(0.0f);
        unrolled<S>([&](auto to) __attribute__((always_inline)) { sums[to.value][v.value] = first; });
      });
      for (int tap = 0; tap < kTaps; ++tap) {
        const float* taps = weights + tap * kTaps * V * kLanes;
        for_each_visible<S>(x, around, C, row + tap - kReach, [&](const T* in, auto column) __attribute__((always_inline)) {
          for_each_pair<S, decltype(column)::value>([&](auto from, auto to, auto t) __attribute__((always_inline)) {
            unrolled<V>([&](auto v) __attribute__((always_inline)) {
              sums[to.value][v.value] = multiply_add(load(in + from.value * C + v.value * kLanes),
                                                     load(taps + (t.value * V + v.value) * kLanes),
                                                     sums[to.value][v.value]);
            });
          });
        });
      }
      T* to_row = out + (k * S + row) * S * C;
      unrolled<S>([&](auto to) __attribute__((always_inline)) {
        unrolled<V>([&](auto v) __attribute__((always_inline)) {
          store(to_row + to.value * C + v.value * kLanes, sums[to.value][v.value]);
        });
      });
    }
  }
}

template <int S, class T>
void depthwise_weights_of(const DepthwiseCells& cells, const T* x, const T* grad, float* sums) {
  constexpr int kSide = Around<S>::kSide;
  const std::int64_t C = cells.C;
  Float of_bias = load(sums + kTaps * kTaps * kLanes);
  for (std::int64_t k = 0; k < cells.K; ++k) {
    const std::int32_t* around = cells.around + k * kSide * kSide;
    const T* of_cell = grad + k * S * S * C;
    for (int position = 0; position < S * S; ++position) of_bias += load(of_cell + position * C);
    for (int tap = 0; tap < kTaps; ++tap) {
      float* of_row = sums + tap * kTaps * kLanes;
      Float taps[kTaps];
      unrolled<kTaps>([&](auto t) __attribute__((always_inline)) { taps[t.value] = load(of_row + t.value * kLanes); });
      for (int row = 0; row < S; ++row) {
        const T* slopes = of_cell + row * S * C;
        for_each_visible<S>(x, around, C, row + tap - kReach, [&](const T* in, auto column) __attribute__((always_inline)) {
          for_each_pair<S, decltype(column)::value>([&](auto from, auto to, auto t) __attribute__((always_inline)) {
            taps[t.value] = multiply_add(load(in + from.value * C), load(slopes + to.value * C), taps[t.value]);
          });
        });
      }
      unrolled<kTaps>([&](auto t) __attribute__((always_inline)) { store(of_row + t.value * kLanes, taps[t.value]); });
    }
  }
  store(sums + kTaps * kTaps * kLanes, of_bias);
}

// Calls body(Constant<s>{}) for the side of a cell.
template <class Body>
inline void with_side(std::int64_t s, const Body& body) {
  if (s == 8) return body(Constant<8>{});
  if (s == 4) return body(Constant<4>{});
  if (s == 2) return body(Constant<2>{});
  body(Constant<1>{});
}

std::int64_t depthwise_width(std::int64_t s, std::int64_t C) {
  const std::int64_t wide = kSums / s * kLanes;
  return C < wide ? kLanes : wide;
}

void depthwise(const DepthwiseCells& cells, DType dtype, const void* x, const float* weights, const float* bias,
               void* out) {
  with_float_pointer(out, dtype, [&](auto* to) {
    const auto* from = static_cast<decltype(to)>(const_cast<void*>(x));
    with_side(cells.s, [&](auto s) {
      if (depthwise_width(cells.s, cells.C) == kLanes)
        depthwise_of<s.value, 1>(cells, from, weights, bias, to);
      else
        depthwise_of<s.value, kSums / s.value>(cells, from, weights, bias, to);
    });
  });
}

void depthwise_weights(const DepthwiseCells& cells, DType dtype, const void* x, const void* grad, float* sums) {
  with_float_pointer(x, dtype, [&](const auto* from) {
    const auto* slopes = static_cast<decltype(from)>(grad);
    with_side(cells.s, [&](auto s) { depthwise_weights_of<s.value>(cells, from, slopes, sums); });
  });
}

}  // namespace
}  // namespace fastmae
