//! The cache of a matrix of products: finished blocks on disk, so that none is computed again.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::collection::Collection;
use super::products::{Block, Options, Table};
use crate::error::Result;
use crate::storage::digest::sha256_of_bytes;
use crate::storage::local;

/// Changes with what the files hold and with the arithmetic.
const VERSION: &str = "lorafast products 2";
const DIGEST: usize = 32;

/// Tells apart what blocks are of and how they are made.
pub(super) fn digest_of(collection: &Collection, blocks: &[Block], options: &Options) -> String {
    let mut text = format!("{VERSION}\n{:?} {}\n", options.precision, options.per_module);
    for member in &collection.members {
        text += &member.identity;
        text.push('\n');
        // Which modules are the same depends on all members.
        for piece in &member.pieces {
            text += &format!("{} {} {:?}", piece.module, piece.is_transposed, piece.outputs);
        }
    }
    for block in blocks {
        text += &format!("{:?}\n", block.members());
    }
    sha256_of_bytes(text.as_bytes())
}

/// A directory of blocks that belong to one collection under one set of options.
pub(super) struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// The place of these products in a directory that may hold many.
    pub fn open(
        root: &Path,
        collection: &Collection,
        blocks: &[Block],
        options: &Options,
    ) -> Result<Self> {
        let digest = digest_of(collection, blocks, options);
        let directory = root.join(format!("products-{}", &digest[..24]));
        local::create_directory(&directory)?;
        Ok(Self { directory })
    }

    fn path(&self, index: usize) -> PathBuf {
        self.directory.join(format!("block-{index:06}"))
    }

    /// What is done of a block; nothing where the file is not there or not whole.
    pub fn find(&self, index: usize, block: &Block, modules: usize) -> Option<Table> {
        let (mut file, _) = local::open(&self.path(index)).ok()?;
        let bytes = local::read_whole(&mut file).ok()?;
        let (content, digest) = bytes.split_last_chunk::<DIGEST>()?;
        if Sha256::digest(content).as_slice() != digest {
            return None;
        }
        let numbers: Vec<u64> = content
            .chunks_exact(8)
            .map(|chunk| u64::from_le_bytes(chunk.try_into().expect("eight bytes")))
            .collect();
        let [next, tables, values @ ..] = &numbers[..] else { return None };
        let size = block.height() * block.width();
        let next = usize::try_from(*next).ok().filter(|next| *next <= modules)?;
        if values.len() as u64 != (tables + 1) * size as u64 {
            return None;
        }
        let mut tables =
            values.chunks(size).map(|table| table.iter().copied().map(f64::from_bits).collect());
        let all = tables.next()?;
        Some(Table { next, all, modules: tables.collect(), was_found: false })
    }

    /// Writes down what is done of a block: the whole of it or, to whoever looks, nothing.
    pub fn save(&self, index: usize, table: &Table) -> Result<()> {
        let path = self.path(index);
        let mut content = Vec::new();
        let numbers = [table.next as u64, table.modules.len() as u64];
        numbers.iter().for_each(|number| content.extend(number.to_le_bytes()));
        for value in table.all.iter().chain(table.modules.iter().flatten()) {
            content.extend(value.to_bits().to_le_bytes());
        }
        let digest = Sha256::digest(&content);
        content.extend_from_slice(&digest);
        let partial = self.directory.join(format!("block-{index:06}.{}", std::process::id()));
        local::write_whole(&path, &partial, &content)
    }
}
