//! What the config of an OFT adapter says of its rotations.

use serde_json::Value;

use super::{Reader, features::Version};
use crate::adapter::deltas::Cayley;
use crate::error::{Error, Result};
use crate::limits;

/// PEFT's default bound of a block's norm (`eps`).
const BOUND: f64 = 6e-5;
/// PEFT's default number of terms of the series.
const TERMS: u64 = 5;
/// Since this release the series is the one that is computed here.
const SERIES_SINCE: (u64, u64, u64) = (0, 18, 0);

/// How the rotations of an OFT adapter are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotation {
    /// Whether all blocks of a module are the same (`block_share`).
    pub shared: bool,
    /// The bound on the norms of its blocks (`coft`, `eps`).
    pub bound: Option<f64>,
    /// How a rotation is made of a block (`use_cayley_neumann`, `num_cayley_neumann_terms`).
    pub cayley: Cayley,
}

impl Rotation {
    pub(super) fn read(reader: &Reader<'_>) -> Result<Self> {
        let refuse = |message: &str| Error::unsupported(reader.path, message);
        if !reader.raw.contains_key("oft_block_size") {
            return Err(refuse(
                "is an OFT of a release of PEFT before 0.14 (it has no oft_block_size), whose rotations \
                 are made otherwise; merge it with PEFT 0.13, or train it again",
            ));
        }
        let version = reader.raw.get("peft_version").and_then(Value::as_str);
        let version = version.and_then(Version::parse);
        // The default of the releases that have the setting.
        let is_series = match reader.raw.get("use_cayley_neumann") {
            None | Some(Value::Null) => true,
            Some(_) => reader.flag("use_cayley_neumann")?,
        };
        if is_series && version.is_none_or(|version| version.release < SERIES_SINCE) {
            return Err(refuse(
                "is an OFT with rotations by a series (use_cayley_neumann) of a release of PEFT before \
                 0.18, whose series is another; merge it with that release, or train it again",
            ));
        }
        let cayley = match (is_series, reader.raw.get("num_cayley_neumann_terms")) {
            (false, _) => Cayley::Exact,
            (true, None | Some(Value::Null)) => Cayley::Series(TERMS),
            (true, Some(value)) => match value.as_u64() {
                Some(terms) if (1..=limits::SERIES).contains(&terms) => Cayley::Series(terms),
                _ => {
                    return Err(reader.broken(format!(
                        "sets num_cayley_neumann_terms to {value}; it is a whole number from 1 to {}",
                        limits::SERIES
                    )));
                }
            },
        };
        let bound = match reader.flag("coft")? {
            false => None,
            true => Some(match reader.raw.get("eps") {
                None | Some(Value::Null) => BOUND,
                Some(value) => value.as_f64().filter(|bound| *bound >= 0.0).ok_or_else(|| {
                    reader.broken(format!("sets eps to {value}; it is a number of at least 0"))
                })?,
            }),
        };
        Ok(Self { shared: reader.flag("block_share")?, bound, cayley })
    }
}
