// What functions for ctypes return: a message, or null where all went well.
#pragma once

#include <exception>
#include <string>

inline std::string last_message;

template <typename Function>
const char* guarded(Function function) {
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    last_message = error.what();
    return last_message.c_str();
  }
}
