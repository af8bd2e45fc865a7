//! The digests of the shards that a view would be written as, without writing them.

use std::sync::Arc;
use std::time::Duration;

use indexmap::IndexMap;
use sha2::{Digest, Sha256};

use super::{Next, View};
use crate::error::Result;
use crate::parallel::task::Task;
use crate::storage::digest::hexadecimal;

/// How long the next tensor is waited for before the task is looked at.
const STEP: Duration = Duration::from_millis(50);

impl View {
    /// The SHA-256 of every shard, by its name, in hexadecimal. What is in memory is what a stream has.
    ///
    /// # Errors
    /// As [`View::read`].
    pub fn shard_digests(self: &Arc<Self>, task: &Task) -> Result<IndexMap<String, String>> {
        let mut hashers: Vec<_> =
            (self.plan.shards.iter()).map(|shard| Sha256::new_with_prefix(&shard.header)).collect();
        task.expect(self.plan.bytes());
        let order = self.tensors().to_vec();
        let stream = self.stream(order.clone())?;
        loop {
            if let Err(error) = task.check() {
                stream.stop();
                return Err(error);
            }
            match stream.next(STEP)? {
                Next::Item(item) => {
                    hashers[order[item.position].0].update(&item.bytes);
                    task.advance(item.bytes.len() as u64);
                }
                Next::Later => {}
                Next::End => break,
            }
        }
        let names = self.plan.shards.iter().map(|shard| shard.name.clone());
        Ok(names.zip(hashers.into_iter().map(|hasher| hexadecimal(&hasher.finalize()))).collect())
    }
}
