// what a page saves as files: made here from what it holds, so that it works without a network
function interpSave(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function interpCsv(rows) {
  const cell = (value) => {
    if (typeof value === "number") return Number.isFinite(value) ? String(value) : "";
    const text = String(value ?? "");
    // spreadsheets run a text that begins so
    const runs = /^(\s*[=+\-@]|[\t\r])/.test(text) && !/^[+-]?\d*\.?\d+%?$/.test(text);
    const kept = runs ? `'${text}` : text;
    return /[",\r\n]/.test(kept) ? `"${kept.replaceAll('"', '""')}"` : kept;
  };
  return rows.map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}

