// Comes before every source of the build under UndefinedBehaviorSanitizer, which looks at
// conversions of numbers, not of vectors. There, a location that no integer can hold would go
// unnoticed.
#pragma once

#include <type_traits>

namespace checked {

// Never inline: the checks of all conversions of a kernel would take minutes to compile.
template <typename To, typename From>
__attribute__((noinline)) void convert_to(To* to, const From* from) {
  for (unsigned i = 0; i < sizeof(To) / sizeof((*to)[0]); ++i) {
    (*to)[i] = static_cast<std::decay_t<decltype((*to)[0])>>((*from)[i]);
  }
}

template <typename To, typename From>
inline __attribute__((always_inline)) To convert(const From& from) {
  To to;
  convert_to(&to, &from);
  return to;
}

}  // namespace checked

#define __builtin_convertvector(from, ...) checked::convert<__VA_ARGS__>(from)
