//! XLabs' names of the layers of Flux's attention.

/// What the two streams of a block of Flux are called by XLabs' numbers.
pub const STREAMS: [(&str, &str); 2] = [("1", "img_attn"), ("2", "txt_attn")];

/// What XLabs' trainer calls the part of a processor that holds the factors of a layer of Flux, under its
/// authors' name: `double_blocks.0.processor.qkv_lora1`. Of `linear1` they are of q, k and v alone.
pub fn layer(module: &str) -> Option<String> {
    let mut parts = module.rsplitn(3, '.');
    let (layer, inner, outer) = (parts.next()?, parts.next()?, parts.next());
    let is_block = |block: &str, kind: &str| {
        let (blocks, number) = block.rsplit_once('.').unwrap_or(("", block));
        let is_kind = blocks == kind || blocks.ends_with(&format!(".{kind}"));
        is_kind && number.parse::<u32>().is_ok()
    };
    let (number, _) = STREAMS.iter().find(|(_, stream)| *stream == inner).unwrap_or(&("", ""));
    if !number.is_empty() {
        let block = outer.filter(|block| is_block(block, "double_blocks"))?;
        let is_known = matches!(layer, "qkv" | "proj");
        return is_known.then(|| format!("{block}.processor.{layer}_lora{number}"));
    }
    let block = module.strip_suffix(layer)?.strip_suffix('.')?;
    let layer = match layer {
        "linear1" => "qkv",
        "linear2" => "proj",
        _ => return None,
    };
    is_block(block, "single_blocks").then(|| format!("{block}.processor.{layer}_lora"))
}
