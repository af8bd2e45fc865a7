//! Where modules lie in their model: the block and the layer that their paths name.

/// A module's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The index of its block; `None` outside of blocks.
    pub block: Option<i64>,
    /// Its path within the block.
    pub layer: String,
}

/// The places of modules of one model. A block's index is a whole number that is a part of the path
/// and has others behind it: the first that has one before it too, or else the first part.
///
/// What stands before the block's index is left out where it is the same for all blocks, and kept
/// where blocks of several kinds (an encoder's and a decoder's) would be taken for one.
pub fn places(paths: &[String]) -> Vec<Place> {
    let found: Vec<_> = paths.iter().map(|path| block_of(path)).collect();
    let mut stems = found.iter().flatten().map(|(stem, ..)| stem);
    let first = stems.next();
    let has_several = stems.any(|stem| Some(stem) != first);
    let place = |(path, found): (&String, &Option<_>)| match *found {
        None => Place { block: None, layer: path.clone() },
        Some((stem, block, rest)) => {
            let stem: &str = stem;
            let is_kept = has_several && !stem.is_empty();
            let layer = if is_kept { format!("{stem}.{rest}") } else { String::from(rest) };
            Place { block: Some(block), layer }
        }
    };
    paths.iter().zip(&found).map(place).collect()
}

/// What stands before the block's index, the index, and what stands behind it.
fn block_of(path: &str) -> Option<(&str, i64, &str)> {
    let index_at = |start: usize| -> Option<(i64, &str)> {
        let (part, rest) = path[start..].split_once('.')?;
        let is_whole = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        // One of more digits than any model has blocks is a name.
        let index = part.parse().ok().filter(|_| is_whole && !rest.is_empty())?;
        Some((index, rest))
    };
    let later = path.match_indices('.').find_map(|(dot, _)| {
        let (index, rest) = index_at(dot + 1)?;
        Some((&path[..dot], index, rest))
    });
    later.or_else(|| index_at(0).map(|(index, rest)| ("", index, rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(paths: &[&str]) -> Vec<(Option<i64>, String)> {
        let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
        places(&paths).into_iter().map(|place| (place.block, place.layer)).collect()
    }

    #[test]
    fn blocks_and_layers_are_told_from_paths() {
        for (path, block, layer) in [
            ("model.layers.11.self_attn.q_proj", Some(11), "self_attn.q_proj"),
            ("model.layers.1.experts.7.up", Some(1), "experts.7.up"),
            ("0.attn", Some(0), "attn"),
            // The first part is one only where there is no other.
            ("0.blocks.3.attn", Some(3), "attn"),
            ("lm_head", None, "lm_head"),
            ("layers.3", None, "layers.3"),
            ("layers.3.", None, "layers.3."),
            ("layers.3a.q", None, "layers.3a.q"),
            ("layers.99999999999999999999.q", None, "layers.99999999999999999999.q"),
        ] {
            assert_eq!(told(&[path]), [(block, layer.to_owned())], "{path}");
        }
    }

    #[test]
    fn blocks_of_several_kinds_keep_what_stands_before_them() {
        let found = told(&["encoder.0.q", "decoder.0.q", "head"]);
        let expected = [(Some(0), "encoder.q"), (Some(0), "decoder.q"), (None, "head")];
        assert_eq!(found, expected.map(|(block, layer)| (block, layer.to_owned())));
    }
}
