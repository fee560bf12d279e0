// The view Chat.
export function mount() {}
