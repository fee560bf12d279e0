// Tabs as in the ARIA pattern: one is a Tab stop, arrows move and choose.

/** Make the tabs in `list` choose among `names`, in their order; returns `choose(name, {focus})`. */
export function tablist(list, names, onChoose, first = names[0]) {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const choose = (name, { focus = false } = {}) => {
    tabs.forEach((tab, i) => {
      const isChosen = names[i] === name;
      tab.setAttribute("aria-selected", String(isChosen));
      tab.tabIndex = isChosen ? 0 : -1;
      if (isChosen && focus) tab.focus();
    });
    onChoose(name);
  };
  tabs.forEach((tab, i) => tab.addEventListener("click", () => choose(names[i])));
  list.addEventListener("keydown", (event) => {
    const at = tabs.indexOf(document.activeElement);
    const step = getComputedStyle(list).direction === "rtl" ? -1 : 1;
    const next = { ArrowRight: at + step, ArrowLeft: at - step, Home: 0, End: tabs.length - 1 }[event.key];
    if (at < 0 || next === undefined || event.altKey || event.ctrlKey) return;
    event.preventDefault();
    event.stopPropagation();
    choose(names[(next + tabs.length) % tabs.length], { focus: true });
  });
  choose(first);
  return choose;
}
