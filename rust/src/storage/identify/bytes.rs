//! What a file is by its first bytes.

use super::Identity;
use crate::storage::file_names::ADAPTER_FILES;

/// What to do with a file that came from elsewhere and is something else than was asked for.
const FETCH: &str = "fetch the file itself again";
/// Beginnings that only one kind of file has: the bytes, what it is, and what to do.
const MAGIC: [(&[u8], &str, &str); 22] = [
    (b"algg", "a LoRA in llama.cpp's oldest format (GGML)", GIVE_ORIGINAL),
    (b"tjgg", "a model in llama.cpp's older format (GGML)", GIVE_ORIGINAL),
    (b"lmgg", "a model in llama.cpp's older format (GGML)", GIVE_ORIGINAL),
    (b"\x93NUMPY", "a NumPy array (.npy)", "save it as safetensors under the names of its tensors"),
    (
        b"\x89HDF\r\n\x1a\n",
        "an HDF5 file, as Keras saves weights",
        "give weights in safetensors files",
    ),
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (b"BZh", "a bzip2 archive", UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (b"PAR1", "a Parquet file, a table of data", FETCH),
    (b"ARROW1", "an Arrow file, a table of data", FETCH),
    (b"SQLite format 3\0", "a SQLite database", FETCH),
    (b"\x89PNG", "a PNG picture", FETCH),
    (b"\xff\xd8\xff", "a JPEG picture", FETCH),
    (b"GIF8", "a GIF picture", FETCH),
    (b"RIFF", "a picture or a sound (RIFF)", FETCH),
    (b"%PDF-", "a PDF document", FETCH),
    (b"\x7fELF", "a program (ELF)", FETCH),
    (b"MZ", "a program of Windows", FETCH),
    (b"/annex/objects/", "a git-annex pointer, which stands for the file itself", ANNEX),
];
/// How the words for what is no weights begin.
pub(super) const TEXTS: [&str; 6] =
    ["a text", "JSON", "an HTML page", "an XML", "the error", "an empty file"];
/// How the words for other weights begin.
pub(super) const WEIGHTS: [&str; 7] = [
    "a GGUF",
    "an HDF5",
    "a NumPy array",
    "an NPZ archive",
    "an ONNX model",
    "a TensorFlow Lite",
    "a Git LFS pointer",
];
/// How the words for torch's files begin.
pub(super) const PYTORCH: &str = "a PyTorch file";
/// How the words for a GGUF file of an adapter begin.
pub(super) const GGUF_ADAPTER: &str = "a GGUF adapter";
pub(super) const PICKLE: &str = "a Python pickle";
pub(super) const SAFETENSORS: &str = "a safetensors file";
const UNPACK: &str = "unpack it, and give what it holds";
const ANNEX: &str = "fetch the file with `git annex get`";
const GIVE_ORIGINAL: &str = "give the safetensors files that it was made from";
const CONVERT: &str = "save its tensors as safetensors (`safetensors.torch.save_file(torch.load(…, \
                       weights_only=True), …)`)";

/// What a file of that size is, where its first bytes tell.
pub fn of_bytes(head: &[u8], size: u64) -> Option<Identity> {
    let plain = |what: &str, advice: &str| Some(Identity::new(what, advice));
    if size == 0 {
        return plain("an empty file", FETCH);
    }
    if is_safetensors(head) {
        return plain(SAFETENSORS, "give it under a name that ends in .safetensors");
    }
    if let Some(pointer) = git_lfs(head) {
        return Some(pointer);
    }
    if head.starts_with(b"GGUF") {
        return Some(gguf(head));
    }
    if head.starts_with(b"PK\x03\x04") || head.starts_with(b"PK\x05\x06") {
        return Some(zip(head));
    }
    if is_pickle(head) {
        return Some(pickle(head));
    }
    if let Some((_, what, advice)) = MAGIC.iter().find(|(magic, ..)| head.starts_with(magic)) {
        return plain(what, advice);
    }
    if head.get(257..262) == Some(b"ustar") {
        return plain("a tar archive", UNPACK);
    }
    if head.get(4..8) == Some(b"TFL3") {
        return plain("a TensorFlow Lite model", "give weights in safetensors files");
    }
    if is_onnx(head) {
        return plain("an ONNX model", GIVE_ORIGINAL);
    }
    if head.iter().all(|byte| *byte == 0) {
        return plain(
            "full of zeros from its first byte on, as a download that was cut off leaves it",
            FETCH,
        );
    }
    text(head)
}

/// A header length and the brace that a header begins with.
fn is_safetensors(head: &[u8]) -> bool {
    // Nobody's header has 2⁴⁰ bytes; of a text or an archive the bytes that count are not zero.
    head.get(8) == Some(&b'{') && head[5..8] == [0; 3]
}

fn git_lfs(head: &[u8]) -> Option<Identity> {
    let text = head.strip_prefix(b"version https://git-lfs.github.com/spec/")?;
    let text = String::from_utf8_lossy(text);
    let size = text.lines().find_map(|line| line.strip_prefix("size ")?.trim().parse::<u64>().ok());
    let of = size.map_or(String::new(), |size| format!(" of {size} bytes"));
    Some(Identity::new(
        format!("a Git LFS pointer, which stands for the file itself{of}"),
        "fetch that with `git lfs pull` (after `git lfs install`)",
    ))
}

fn gguf(head: &[u8]) -> Identity {
    // A string of the metadata: its key, four bytes of its type, eight of its length, its bytes.
    let key = b"general.type";
    let at = head.windows(key.len()).position(|window| window == key);
    let value = at.and_then(|at| head.get(at + key.len() + 12..)).unwrap_or_default();
    match value.starts_with(b"adapter") {
        true => Identity::new(
            format!("{GGUF_ADAPTER}, in llama.cpp's format"),
            "give it as the adapter, under a name that ends in .gguf",
        ),
        false => Identity::new("a GGUF model, in llama.cpp's format", GIVE_ORIGINAL),
    }
}

fn zip(head: &[u8]) -> Identity {
    let length = head.get(26..28).map_or(0, |two| u16::from_le_bytes([two[0], two[1]]));
    let first = head.get(30..30 + usize::from(length)).map(String::from_utf8_lossy);
    let first = first.unwrap_or_default();
    let in_folder = |name: &str| first.split_once('/').is_some_and(|(_, rest)| rest == name);
    let of_torch =
        ["data.pkl", "version", ".format_version", "byteorder", ".data/serialization_id"];
    if of_torch.into_iter().any(in_folder) {
        return of_pytorch(&format!(
            "{PYTORCH} (what torch.save writes: a ZIP archive with a pickle)"
        ));
    }
    if first.ends_with(".npy") {
        return Identity::new(
            format!(
                "an NPZ archive of NumPy arrays (the first: {})",
                first.trim_end_matches(".npy")
            ),
            "save its arrays as safetensors (`safetensors.numpy.save_file(dict(numpy.load(…)), …)`)",
        );
    }
    let begins =
        if first.is_empty() { String::new() } else { format!(" (it begins with {first})") };
    Identity::new(format!("a ZIP archive{begins}"), UNPACK)
}

/// The beginning of a pickle from protocol 2 on. A safetensors file whose header has 640 bytes
/// begins like one, but has zeros next.
fn is_pickle(head: &[u8]) -> bool {
    matches!(head, [0x80, 2..=5, third, ..] if *third != 0)
}

fn pickle(head: &[u8]) -> Identity {
    /// torch.save's number before 1.6, 0x1950a86a20f9469cfc6c.
    const TORCH: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
    match head.windows(TORCH.len()).take(16).any(|window| window == TORCH) {
        true => {
            of_pytorch(&format!("{PYTORCH} in the form before 1.6 (pickles one after the other)"))
        }
        false => of_pytorch(PICKLE),
    }
}

fn of_pytorch(what: &str) -> Identity {
    let [_, pickled, config] = ADAPTER_FILES;
    Identity::new(
        what,
        format!("{CONVERT}, or, if it is an adapter's, name it {pickled} beside its {config}"),
    )
}

/// A protobuf message that begins with the version of ONNX's format and goes on with its producer or
/// its operators.
fn is_onnx(head: &[u8]) -> bool {
    matches!(head, [0x08, 1..=20, 0x12 | 0x1a | 0x3a | 0x42, ..])
}

/// A page, a message of a server, or another text.
fn text(head: &[u8]) -> Option<Identity> {
    let valid = match std::str::from_utf8(head) {
        Ok(text) => text,
        // Cut in the middle of a character.
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&head[..error.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    let text = valid.trim_start_matches('\u{feff}').trim_start();
    if text.is_empty() || text.chars().any(|each| each.is_control() && !each.is_whitespace()) {
        return None;
    }
    let lower = text.to_lowercase();
    let between = |open: &str, close: &str| {
        let start = lower.find(open)? + open.len();
        let end = start + lower.get(start..)?.find(close)?;
        text.get(start..end).map(quoted)
    };
    if ["<!doctype html", "<html", "<head"].iter().any(|tag| lower.starts_with(tag)) {
        let title = between("<title>", "</title>");
        let title = title.map_or(String::new(), |title| format!(" (its title: {title})"));
        return Some(Identity::new(
            format!("an HTML page{title}"),
            "the download led to a page, as before a login; fetch the file itself again",
        ));
    }
    if lower.starts_with("<?xml") || lower.starts_with("<error") {
        let code = between("<code>", "</code>");
        return Some(match code {
            Some(code) => Identity::new(format!("the error {code} of a server, in XML"), FETCH),
            None => Identity::new("an XML document", FETCH),
        });
    }
    let is_json = text.starts_with(['{', '[']);
    let known = [
        (
            "\"peft_type\"",
            "JSON, the config of an adapter, no weights",
            "give the adapter's directory",
        ),
        ("\"weight_map\"", "JSON, the index of a model's shards", "give the model's directory"),
        ("\"model_type\"", "JSON, the config of a model, no weights", "give the model's directory"),
    ];
    if let Some((_, what, advice)) = known.iter().find(|(key, ..)| is_json && text.contains(key)) {
        return Some(Identity::new(*what, *advice));
    }
    let kind = if is_json { "JSON" } else { "a text" };
    Some(Identity::new(
        format!("{kind}, no weights (it begins with {})", quoted(text)),
        "if weights should be in it, fetch the file again",
    ))
}

/// The beginning of a text, in one line.
fn quoted(text: &str) -> String {
    const LONGEST: usize = 40;
    let words: Vec<_> = text.split_whitespace().collect();
    let line = words.join(" ");
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("“{}…”", &line[..end]),
        None => format!("“{line}”"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn what(head: &[u8]) -> String {
        of_bytes(head, head.len() as u64).map_or_else(String::new, |identity| identity.what)
    }

    #[test]
    fn a_file_is_named_by_its_first_bytes() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4712\n";
        assert_eq!(
            what(pointer),
            "a Git LFS pointer, which stands for the file itself of 4712 bytes"
        );
        let page = b"\n<!DOCTYPE HTML><head><TITLE>Sign\n in</TITLE>";
        assert_eq!(what(page), "an HTML page (its title: “Sign in”)");
        assert!(
            what(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>").contains("AccessDenied")
        );
        assert!(what(b"{\"error\": \"Invalid username\"}").starts_with("JSON"));
        assert!(what("Accès refusé".as_bytes()).starts_with("a text, no weights"));
        assert!(what(b"GGUF\x03\0\0\0").starts_with("a GGUF model"));
        let adapter = b"GGUF\x03\0\0\0general.type\x08\0\0\0\x07\0\0\0\0\0\0\0adapter";
        assert!(what(adapter).starts_with("a GGUF adapter"));
        assert!(what(b"").starts_with("an empty file"));
        assert!(what(&[0; 64]).starts_with("full of zeros"));
        assert!(what(b"\x08\x08\x12\x07pytorch").starts_with("an ONNX model"));
        assert!(what(b"\x80\x02}q\x01.").starts_with("a Python pickle"));
        assert!(what(b"\x1f\x8b\x08").starts_with("a gzip"));
        assert_eq!(what(b"\x01\x02\xff\xfe nothing known"), "");
    }

    #[test]
    fn a_safetensors_header_is_no_pickle() {
        let mut head = 640u64.to_le_bytes().to_vec();
        head.extend(b"{\"x\": 1}");
        assert_eq!(what(&head), "a safetensors file");
        head[8] = b'x';
        assert_eq!(what(&head), "");
    }

    #[test]
    fn an_archive_is_named_by_its_first_entry() {
        let zip = |name: &str| {
            let mut head = b"PK\x03\x04".to_vec();
            head.resize(26, 0);
            head.extend((name.len() as u16).to_le_bytes());
            head.extend([0, 0]);
            head.extend(name.as_bytes());
            what(&head)
        };
        assert!(zip("archive/data.pkl").starts_with("a PyTorch file"));
        assert!(zip("model/.format_version").starts_with("a PyTorch file"));
        assert!(
            zip("x.lora_a.npy").starts_with("an NPZ archive of NumPy arrays (the first: x.lora_a)")
        );
        assert!(
            zip("style/readme.txt").starts_with("a ZIP archive (it begins with style/readme.txt)")
        );
    }
}
