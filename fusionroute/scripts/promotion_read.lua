-- Answer  {'done', revision, checkpoint_id, fingerprint, previous}
return answer('done')
