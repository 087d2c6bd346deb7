// A chat in one file: no library, no build. All text of user and model enters the page as text, never as markup.
"use strict";
const log = document.getElementById("log"), form = document.getElementById("form"), text = document.getElementById("text");
const send = document.getElementById("send"), stop = document.getElementById("stop");
let messages = [], running = null;

function element(parent, tag, name, content) {
  const made = parent.appendChild(document.createElement(tag));
  if (name) made.className = name;
  if (content !== undefined) made.textContent = content;
  return made;
}

// Text between lines of three backticks is code; what comes while a block is open is code, too.
function show(target, answer) {
  target.replaceChildren();
  answer.split(/^```.*$\n?/m).forEach((part, index) => {
    if (index % 2) element(element(target, "pre"), "code", "", part);
    else if (part) target.appendChild(document.createTextNode(part));
  });
}

// Follow the text only while its end is in view: who has scrolled up is reading.
function following(change) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function busy(is) { send.hidden = is; stop.hidden = !is; }

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

async function ask(question) {
  messages.push({ role: "user", content: question });
  element(log, "div", "turn user", question);
  const turn = element(log, "div", "turn assistant"), thought = element(turn, "div", "thought"), body = element(turn, "div");
  log.scrollTop = log.scrollHeight;
  const mine = running = new AbortController();
  let answer = "", note = "";
  busy(true);
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", signal: mine.signal, headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ messages, stream: true, temperature: 0.7 }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const { delta, finish_reason } = chunk.choices[0];
      following(() => {
        if (delta.reasoning_content) thought.textContent += delta.reasoning_content;
        if (delta.content) show(body, answer += delta.content);
      });
      if (finish_reason === "length") note = "The length limit ended this answer.";
    }
  } catch (error) {
    note = error.name === "AbortError" ? "Stopped." : `Ended early: ${error.message}`;
  }
  if (running !== mine) return; // a new chat began meanwhile
  following(() => { if (note) element(turn, "div", "note", note); });
  messages.push({ role: "assistant", content: answer });
  running = null;
  busy(false);
  text.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = text.value;
  if (running || !question.trim()) return;
  text.value = "";
  ask(question);
});
text.addEventListener("keydown", (event) => {
  // Enter that accepts a Chinese or Japanese candidate belongs to the input method
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  form.requestSubmit();
});
stop.addEventListener("click", () => running && running.abort());
document.getElementById("new").addEventListener("click", () => {
  const old = running;
  running = null;
  messages = [];
  log.replaceChildren();
  busy(false);
  if (old) old.abort();
  text.focus();
});
