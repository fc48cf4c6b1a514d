_base_ = './retinanet_r50_manpp_k4.py'

# One block a process: tools/dist_train.sh configs/retinanet_r50_manpp_k4_pipeline.py 4, or a multiple of 4 for replicas.
runner_type = 'mmman.PipelineRunner'
