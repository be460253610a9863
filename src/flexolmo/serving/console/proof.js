// Inclusion of an entry in the log's Merkle tree (RFC 9162, section 2.1.3) under a signed head.

const hash = async (...parts) =>
  new Uint8Array(await crypto.subtle.digest("SHA-256", await new Blob(parts).arrayBuffer()));
const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const digest = (text) =>
  Uint8Array.from(text.replace("sha256:", "").match(/../g), (pair) => parseInt(pair, 16));
const isSame = (a, b) => a.length === b.length && a.every((value, i) => value === b[i]);

// The root that a leaf and its path lead to, as section 2.1.3.2 verifies it.
export async function rootOf(leaf, index, size, path) {
  let [first, last, root] = [index, size - 1, leaf];
  for (const step of path) {
    if (last === 0) throw new Error("The path is too long.");
    if (first % 2 === 1 || first === last) {
      root = await hash(Uint8Array.of(1), step, root);
      while (first % 2 === 0 && first !== 0) [first, last] = [first / 2, Math.floor(last / 2)];
    } else {
      root = await hash(Uint8Array.of(1), root, step);
    }
    [first, last] = [Math.floor(first / 2), Math.floor(last / 2)];
  }
  if (last !== 0) throw new Error("The path is too short.");
  return root;
}

// An ASN.1 signature's two numbers, 32 bytes each, as the browser wants them.
function plainSignature(der) {
  const numbers = [];
  for (let at = 2; numbers.length < 2; at += 2 + der[at + 1]) {
    const number = der.slice(at + 2, at + 2 + der[at + 1]);
    const padded = new Uint8Array(32);
    const cut = number.slice(Math.max(0, number.length - 32));
    padded.set(cut, 32 - cut.length);
    numbers.push(padded);
  }
  return new Uint8Array([...numbers[0], ...numbers[1]]);
}

async function readHead(note, pem) {
  const [text, line] = [note.slice(0, note.indexOf("\n\n") + 1), note.split("\n\n")[1]];
  const spki = bytes(pem.replace(/-----[^-]+-----|\s/g, ""));
  const curve = { name: "ECDSA", namedCurve: "P-256" };
  const key = await crypto.subtle.importKey("spki", spki, curve, false, ["verify"]);
  const signature = bytes(line.trim().split(" ").pop()).slice(4);
  const how = { name: "ECDSA", hash: "SHA-256" };
  const signed = new TextEncoder().encode(text);
  if (!await crypto.subtle.verify(how, key, plainSignature(signature), signed)) {
    throw new Error("The tree head's signature does not hold.");
  }
  const [, size, root, time] = text.split("\n");
  const id = await hash(spki);
  const keyId = [...id.slice(0, 8)].map((b) => b.toString(16).padStart(2, "0")).join("");
  return { size: Number(size), root: bytes(root), time: time.replace("time ", ""), keyId };
}

// The signed head under which an inclusion proof holds; throws if it does not.
export async function checkProof(proof, publicKey) {
  const head = await readHead(proof.checkpoint, publicKey);
  const leaf = await hash(Uint8Array.of(0), proof.entry);
  const root = await rootOf(leaf, proof.number, head.size, proof.hashes.map(digest));
  if (!isSame(root, head.root)) {
    throw new Error("The entry and its path lead to another tree head than the signed one.");
  }
  return head;
}
