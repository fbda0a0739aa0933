// Numbers and times as people read them.

export function bytes(count) {
  if (!count) return "0 B";
  const power = Math.min(4, Math.floor(Math.log10(count) / 3));
  const value = count / 1000 ** power;
  return `${value < 10 && power ? value.toFixed(1) : Math.round(value)} ${["B", "KB", "MB", "GB", "TB"][power]}`;
}

export const number = (value) => Number(value).toLocaleString("en-US");

export function tokens(count) {
  if (count == null) return "unknown";
  return count >= 10000 ? `${Math.round(count / 1000)}k` : number(count);
}

export function seconds(value) {
  if (value == null) return "–";
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  if (value < 90) return `${value.toFixed(1)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return value < 172800 ? `${Math.round(value / 3600)} h` : `${Math.round(value / 86400)} days`;
}

export const rate = (value) => (value == null ? "–" : value > 0 && value < 10 ? value.toFixed(1) : `${Math.round(value)}`);
export const clock = (unix) => new Date(unix * 1000).toLocaleTimeString();
export const iso = (unix) => new Date(unix * 1000).toISOString();
