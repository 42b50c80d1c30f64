// answers.h - the fixed answers of both engines, byte for byte the same, so that a client can compare every answer
// with the one it expects whichever way it came.
#pragma once
#include "common.h"

typedef struct {
  const char *data;
  size_t length;
} bytes;

#define TEXT                                                                                                          \
  "The quick brown fox jumps over the lazy dog, and then it does so again and again until the page is full of quick " \
  "brown foxes and lazy dogs, which was the point of the exercise all along."
#define USAGE                                                                                                  \
  "\"usage\":{\"prompt_tokens\":250,\"total_tokens\":314,\"completion_tokens\":64,\"prompt_tokens_details\":{" \
  "\"cached_tokens\":0}},\"system_fingerprint\":\"fp_bench\",\"service_tier\":null}"
#define CHAT_ID "\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\""
#define TEXT_ID "\"id\":\"cmpl-0123456789abcdef0123456789abcdef\""
#define WHEN "\"created\":1700000000,\"model\":\"mock\""
#define BYTES(text) {text, sizeof(text) - 1}

enum { CHAT, COMPLETION };

static const bytes ANSWER[2] = {
    BYTES("{" CHAT_ID ",\"object\":\"chat.completion\"," WHEN
          ",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"" TEXT
          "\",\"reasoning_content\":null,\"tool_calls\":null},\"logprobs\":null,\"finish_reason\":\"stop\","
          "\"matched_stop\":null}]," USAGE),
    BYTES("{" TEXT_ID ",\"object\":\"text_completion\"," WHEN ",\"choices\":[{\"index\":0,\"text\":\"" TEXT
          "\",\"logprobs\":null,\"finish_reason\":\"stop\",\"matched_stop\":null}]," USAGE),
};

static const bytes EVENT[2] = {
    BYTES("data: {" CHAT_ID ",\"object\":\"chat.completion.chunk\"," WHEN
          ",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"logprobs\":null,\"finish_reason\":null}]}"
          "\n\n"),
    BYTES("data: {" TEXT_ID ",\"object\":\"text_completion\"," WHEN
          ",\"choices\":[{\"index\":0,\"text\":\" token\",\"logprobs\":null,\"finish_reason\":null}]}\n\n"),
};

static const bytes LAST_EVENT = BYTES("data: [DONE]\n\n");

// CHAT, COMPLETION, or -1: this path is no inference route.
static inline int kind_of_path(const char *path, size_t length) {
  static const bytes routes[2] = {BYTES("/v1/chat/completions"), BYTES("/v1/completions")};
  for (int kind = 0; kind < 2; kind++)
    if (length == routes[kind].length && !memcmp(path, routes[kind].data, length)) return kind;
  return -1;
}
