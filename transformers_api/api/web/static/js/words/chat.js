// The words of the view Chat.
export const chat = {
  you: "You",
  model: "Model",
  toolResult: (name) => `Result of ${name}`,
};
